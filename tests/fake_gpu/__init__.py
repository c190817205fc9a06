"""A GPU's driver without a GPU: what kvmp does with it is run and looked at, in a process of its own each."""
