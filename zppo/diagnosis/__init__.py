"""What the numbers of a run say about its health: rules, their thresholds, and `zppo doctor`."""
