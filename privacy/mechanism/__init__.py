"""What a guarantee rests on at run time: streams, sampling, noise; by record (dp_sgd) and by client (client_sum)."""
