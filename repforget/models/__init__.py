"""The only rooms that know what a transformer looks like: loading, sites, weights, capture and readout."""
