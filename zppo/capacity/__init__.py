"""How fast machines are and what follows: calibrations read off runs or measured, and what split of
the machines would be faster."""
