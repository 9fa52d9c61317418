"""Load models, original or quantized, and run them: the modules that packed weights run in."""
