"""What a run will take, before it is launched: bytes, FLOPs, time, and the compiler's word."""
