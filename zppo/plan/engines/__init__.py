"""What `engine_args` may hold, one file for each kind of engine."""
