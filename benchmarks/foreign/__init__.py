"""Small models of other packages, to try the tracer on code that nobody here wrote."""
