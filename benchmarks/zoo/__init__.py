"""Small models of every common kind, all sizes different: what the tracer is measured on."""
