"""The training half of the method: windows in, updated weights and metrics out. `step.py` is where
to begin reading."""
