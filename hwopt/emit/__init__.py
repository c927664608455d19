"""The generated C driver: memory plan, weights, header, runtime."""
