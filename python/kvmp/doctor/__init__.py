"""``kvmp doctor``: looks at a machine line by line: what is fine, what is not, and the mend. It changes nothing."""
