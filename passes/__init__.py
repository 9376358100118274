"""Graph passes, one rewrite a file; installs as ``fg_inductor.passes``."""
