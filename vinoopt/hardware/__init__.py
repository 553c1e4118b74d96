"""Hardware profile files and what this machine has."""
