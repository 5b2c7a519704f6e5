"""One training step under the microscope, and its page.

`microscope` looks, `page` writes it as HTML; they may import training and what one reads. The
program, `__main__`, is a run of minibooth.train that stops after looking.
"""
