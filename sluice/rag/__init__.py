"""Documents to a released index."""
