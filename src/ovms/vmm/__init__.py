"""Virtual machine monitors: one protocol, one package for each."""
