"""The systems that are built from `xlayer_ext`, their training loop, their data, and the ``xlayer`` command."""
