"""Everything about files: nothing here runs the model."""
