"""Measure and explain the library: the commands ``bench``, ``profile``, ``demo`` and ``tune``.

The lab imports the library. The library does not import the lab, except where a user asks for it: the command line
(``selfsup_kernels.__main__``) and ``selfsup_kernels.profile``.
"""
