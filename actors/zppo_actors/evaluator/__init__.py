"""`zppo evaluate`: an engine, questions, and their grades, in one process tree."""
