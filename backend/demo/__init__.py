"""The bundled tiny checkpoint, the generator of its pictures and its training."""
