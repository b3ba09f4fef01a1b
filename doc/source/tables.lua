-- For Word: tables in small type (the style "Table Text" of reference.docx), columns as wide as their cells need; a
-- paragraph stays on the page of the table after it; figures have numbers.

local MOST_ROWS = 10 -- of a table that stays on one page
local figures = 0

function Image(found)
  if found.title:sub(1, 4) == "fig:" then -- pandoc marks a figure so
    figures = figures + 1
    table.insert(found.caption, 1, pandoc.Str("Figure " .. figures .. ". "))
  end
  return found
end

function Blocks(found)
  for place = 1, #found - 1 do
    if found[place].t == "Para" and found[place + 1].t == "Table" then
      found[place] = pandoc.Div({ found[place] }, pandoc.Attr("", {}, { ["custom-style"] = "Lead In" }))
    end
  end
  return found
end

-- Room that a cell needs: headings break between words, short cells do not break, long ones take two lines.
local function room(cell, is_heading)
  local text = pandoc.utils.stringify(cell.contents)
  if is_heading then
    local longest = 0
    for word in text:gmatch("%S+") do longest = math.max(longest, utf8.len(word)) end
    return longest
  end
  local length = utf8.len(text)
  return length < 36 and length or math.max(36, length * 0.6)
end

local function each_cell(rows, action)
  for place, row in ipairs(rows) do
    for column, cell in ipairs(row.cells) do action(column, cell, place == #rows or #rows > MOST_ROWS) end
  end
end

function Table(found)
  local widths, all = {}, 0
  local function see(is_heading)
    return function(column, cell, may_end_a_page)
      widths[column] = math.max(widths[column] or 0, room(cell, is_heading) + 3)
      -- Paragraphs, because pandoc has a style of its own for lines; an empty cell has one too, for its row's height.
      local text = pandoc.utils.blocks_to_inlines(cell.contents)
      local paragraph = pandoc.Para(#text > 0 and text or { pandoc.Str("\u{a0}") })
      local style = may_end_a_page and not is_heading and "Table Text, Last" or "Table Text"
      cell.contents = { pandoc.Div({ paragraph }, pandoc.Attr("", {}, { ["custom-style"] = style })) }
    end
  end
  each_cell(found.head.rows, see(true))
  for _, body in ipairs(found.bodies) do each_cell(body.body, see(false)) end
  for _, width in ipairs(widths) do all = all + width end
  for column, spec in ipairs(found.colspecs) do found.colspecs[column] = { spec[1], widths[column] / all } end
  return found
end
