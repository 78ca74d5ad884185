"""ICM: the algorithm (`icm`), the pipelines around a model (`pipeline`) and the command line (`experiments`)."""
