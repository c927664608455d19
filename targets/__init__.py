"""Hardware targets, one per file; found through the entry point group hwopt.targets."""
