"""What the series of a run say: rate, stability, PL bracket, pairs of probes, summary. No JAX."""
