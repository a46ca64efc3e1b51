"""The comparison of methods: runs of several methods and seeds under one topology, and the evidence
drawn from them."""
