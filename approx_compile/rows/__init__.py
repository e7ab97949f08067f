"""The backward pass on selected rows of the batch: analysis, partition, compilation, execution and control. See README.md."""
