"""Exit codes of the commands and of the processes of a run; 0 is success."""

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
"""The user can mend it; one sentence on stderr says what."""
EXIT_FATAL = 70
"""Of an actor: a promise of the run is broken, so starting again would not help; its last line on stderr says which.
70 is what sysexits.h calls an internal software error. The run itself ends with `EXIT_FAILED`."""
EXIT_INTERRUPTED = 130
"""Stopped by Ctrl-C or SIGTERM (128 + SIGINT)."""
