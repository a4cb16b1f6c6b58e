"""Documents to a released index: snapshot, chunk, embed, build, retrieve, gate, switch."""
