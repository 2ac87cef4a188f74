"""The experiments of the paper, each a frozen config and a function from it to a record."""
