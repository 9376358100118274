"""Operators and kernels; installs as ``fg_inductor.kernels``.

``ops`` holds the schemas (torch only), ``reference*`` their meaning, every other file one schedule.
"""
