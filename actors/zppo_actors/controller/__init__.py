"""The controller: owner of everything that must not be lost, as a shell around the scheduler."""
