"""The logic of the chat templates of models that think, written from public descriptions.

All use the marks of ChatML, so that one small tokenizer fits them.
"""

# As Qwen3: the empty think block of a last answer is added, earlier think blocks are dropped, and
# a generation prompt without thinking brings an empty block.
QWEN3 = """
{%- set ns = namespace(search=true, last=messages|length - 1) -%}
{%- for m in messages[::-1] -%}
{%- if ns.search and m.role == 'user' -%}
{%- set ns.search = false -%}{%- set ns.last = messages|length - 1 - loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set content = m.content -%}{%- set thought = '' -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > ns.last and (loop.last or thought) -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}
{%- else -%}
{{- content -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""

# As SmolLM3: the mode is written into a system turn that is always there, and every answer of a
# conversation without thinking brings an empty think block.
SMOLLM3 = """
{%- set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' -%}
{%- if messages[0].role == 'system' -%}
{%- set custom = messages[0].content -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set custom = 'You are a helpful assistant.' -%}{%- set turns = messages -%}
{%- endif -%}
{{- '<|im_start|>system\\nReasoning Mode: ' + mode + '\\n\\n' + custom + '<|im_end|>\\n' -}}
{%- for m in turns -%}
{%- if m.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n' if mode == '/no_think' else '') -}}
{{- m.content.lstrip('\\n') + '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n' if mode == '/no_think' else '') -}}
{%- endif -%}
"""

# As GLM 4.5: a user's text ends with the request not to think, and thoughts and answers are
# trimmed and put on lines of their own.
GLM = """
{%- set off = enable_thinking is defined and not enable_thinking -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{- '<|im_start|>user\\n' + m.content -}}
{{- '/nothink' if off and not m.content.endswith('/nothink') else '' -}}
{%- elif m.role == 'assistant' -%}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip()
    if '</think>' in m.content else '' -%}
{{- '<|im_start|>assistant\\n<think>' + (thought if loop.last else '') + '</think>\\n' -}}
{{- m.content.split('</think>')[-1].strip() -}}
{%- else -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content -}}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant' + ('\\n<think></think>' if off else '') -}}
{%- endif -%}
"""

# As GPT-OSS: the generation prompt stops before the name of the channel.
CHANNELS = """
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|im_start|>assistant<|channel|>final<|message|>' + m.content + '<|im_end|>' -}}
{%- else -%}
{{- '<|im_start|>' + m.role + '<|message|>' + m.content + '<|im_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' -}}{%- endif -%}
"""

# As the distilled DeepSeek-R1: the model always begins with a thought, and a finished conversation
# holds none.
DEEPSEEK_R1 = """
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' + m.content.split('</think>')[-1].strip() + '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""

# As DeepSeek 3.1: one tag opens an answer with, another one without a thought; a finished
# conversation holds no thoughts.
DEEPSEEK_V31 = """
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|im_start|>assistant</think>' + m.content.split('</think>')[-1] + '<|im_end|>' -}}
{%- else -%}
{{- '<|im_start|>' + m.role + m.content + '<|im_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant' + ('<think>' if enable_thinking else '</think>') -}}
{%- endif -%}
"""
