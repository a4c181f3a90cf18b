"""What a guarantee rests on at run time: random streams, sampling, noise, and the sums over records or clients."""
