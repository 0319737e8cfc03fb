"""Key neurons of the MLP: what a key looks for, what its value vector writes.

A *neuron* is a key-value pair j of the MLP of block b, named ``b:j``. Its activation at a token is
the key's coefficient before the activation function (site ``key_mlp``).
"""
