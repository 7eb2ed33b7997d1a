"""Networks with what the algorithms ask of them."""
