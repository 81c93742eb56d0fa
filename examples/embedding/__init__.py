"""Bundles in other applications: Python without PyTorch, a web service, Node.js, a web page, C++."""
