"""`make fuzz`: what others hand the shim, mutated under coverage."""
