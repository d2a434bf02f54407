"""What a model costs on a machine: measured on the running engine, fitted, written as a profile."""
