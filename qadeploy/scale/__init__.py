"""Past one machine: files of questions to a folder of answers, here or on Ray; models on a Triton server."""
