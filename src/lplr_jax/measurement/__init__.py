"""What a probe measures, and what is measured once the run is over."""
