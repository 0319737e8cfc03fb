"""The static site with a page on every key neuron.

``gather`` reads what is known of the neurons into the plain classes of ``content``, block by block;
``pages`` writes them. No file of the site names an address outside it.
"""
