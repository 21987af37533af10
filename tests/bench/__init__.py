"""What grit costs beside the stock shim: `make bench`."""
