"""Sources of questions, the questions checked, and the cursor that gives each out once per pass."""
