"""The machine: how a function is traced, kept, swept backward; rules stand in `fbprop.rules`."""
