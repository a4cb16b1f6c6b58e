"""The application of the demonstration: an assistant, its reviewers' traffic and the guided loop."""
