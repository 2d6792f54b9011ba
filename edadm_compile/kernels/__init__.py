"""Integer kernels. `reference` is the pure-torch truth of every ``edadm::`` operator."""
