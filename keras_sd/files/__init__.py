"""Files: atomic writing, JSON within limits, images with their generation parameters.

writing      writes a file or a folder atomically
json_files   reads untrusted JSON, with limits and declared shapes
image_files  PNG and GIF with A1111's `parameters`, contact sheets
download     SHA-256 of files, and downloads that are checked by it
cache        the folder for everything that is kept between processes
"""
