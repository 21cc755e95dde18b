"""Language models for the benchmarks, each in the framework its module is named after."""
