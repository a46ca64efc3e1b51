"""Where the numbers of a run go besides its own files, each on a thread of its own, so that what is
slow, away or wrong there costs that sink and never the run."""
