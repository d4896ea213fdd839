"""The ``maira-sae`` command and the demonstration."""
