"""Studies: configs × seeds, trained, evaluated and written up by one command."""
