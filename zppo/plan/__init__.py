"""May this run here? Checks that span settings, memory, machine, processes and model folders."""
