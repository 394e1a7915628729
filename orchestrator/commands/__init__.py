"""What each command does. Heavy libraries are imported inside the functions, so that `--help` answers at once."""
